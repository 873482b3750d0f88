// Worker threads that come and go, timers, the thread pool (crypto, zlib).
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
const zlib = require('zlib'), crypto = require('crypto');
if (isMainThread) {
  let round = 0, ticks = 0; const iv = setInterval(() => ticks++, 2);
  const go = () => { if (round == 14) { clearInterval(iv); console.log(ticks > 5 ? 'ticks' : 'few'); return; }
    let left = 3, out = []; const r = round++;
    for (let i = 0; i < 3; i++) new Worker(__filename, { workerData: r * 10 + i }).on('message', m => { out[i] = m; }).on('exit', () => { if (--left == 0) {
      crypto.pbkdf2('p' + r, 's', 20000, 32, 'sha256', (e, k) => { zlib.deflate(Buffer.from(out.join('').repeat(200)), (e, z) => {
        console.log(r, out.map(x => x.slice(0, 8)).join(' '), k.toString('hex').slice(0, 12), z.length); setTimeout(go, 5); }); }); } });
  }; go();
} else { let h = crypto.createHash('sha1'), o = {}; let s = workerData;
  for (let i = 0; i < 150000; i++) { s = (s * 1103515245 + 12345) % 2147483648; o['k' + (s % 997)] = { v: s, t: [i, s] }; if (i % 1000 == 0) h.update(JSON.stringify(o['k' + s % 997] || 0)); }
  parentPort.postMessage(h.digest('hex')); }
