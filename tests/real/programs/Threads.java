// Pools, timers, sleeps, implicit null checks (SIGSEGV handlers) and garbage collections.
import java.util.*; import java.util.concurrent.*; import java.util.concurrent.atomic.*;
public class Work {
  public static void main(String[] a) throws Exception {
    ExecutorService ex = Executors.newFixedThreadPool(4);
    ScheduledExecutorService sch = Executors.newScheduledThreadPool(1);
    AtomicLong ticks = new AtomicLong();
    sch.scheduleAtFixedRate(() -> ticks.incrementAndGet(), 1, 3, TimeUnit.MILLISECONDS);
    for (int round = 0; round < 24; round++) {
      final int r = round; List<Future<Long>> fs = new ArrayList<>();
      for (int t = 0; t < 4; t++) { final int id = t;
        fs.add(ex.submit(() -> { long s = r * 31 + id, sum = 0; Map<Long, byte[]> m = new HashMap<>(); int npe = 0;
          for (int i = 0; i < 300000; i++) { s = s * 6364136223846793005L + 1442695040888963407L; m.put((s >>> 50), new byte[(int) ((s >>> 40) & 127)]);
            int[] n = (s & 1023) == 0 ? null : new int[2]; try { n[0] = i; sum += n[0]; } catch (NullPointerException e) { npe++; }
            if ((i & 65535) == 0) Thread.sleep(1); }
          synchronized (Work.class) { for (byte[] b : m.values()) sum = sum * 31 + b.length; }
          return sum + npe; })); }
      long all = 0; for (Future<Long> f : fs) all = all * 1000003 + f.get();
      System.out.println(r + " " + all); if (r % 8 == 7) System.gc();
    }
    if (ticks.get() < 10) System.out.println("few ticks");
    ex.shutdown(); sch.shutdown(); ex.awaitTermination(5, TimeUnit.SECONDS);
  }
}
