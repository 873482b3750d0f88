# An event loop (epoll), a thread pool, an interval timer with a handler.
import asyncio, signal, hashlib
ticks = 0
def on(*a):
    global ticks; ticks += 1
signal.signal(signal.SIGALRM, on); signal.setitimer(signal.ITIMER_REAL, .003, .003)
async def worker(n, q, out):
    while True:
        j = await q.get()
        if j is None: return
        await asyncio.sleep(0.002)
        loop = asyncio.get_running_loop()
        out.append((j, await loop.run_in_executor(None, lambda: hashlib.pbkdf2_hmac('sha256', b'%d' % j, b's', 20000).hex()[:8])))
async def main():
    for r in range(25):
        q = asyncio.Queue(); out = []
        for j in range(8): q.put_nowait(r * 8 + j)
        for _ in range(3): q.put_nowait(None)
        await asyncio.gather(*(worker(n, q, out) for n in range(3)))
        s = {}
        for i in range(60000): s[i * 7919 % 5003] = str(i)
        print(r, sorted(out), len(s), flush=True)
asyncio.run(main()); signal.setitimer(signal.ITIMER_REAL, 0); print('ticks' if ticks > 10 else 'few')
