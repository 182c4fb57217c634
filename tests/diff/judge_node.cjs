// The judge llhttp, through node's own http server and client. Usage: node judge_node.cjs requests|responses
// Frames and lines are as in judge_python.py.
'use strict';
const http = require('node:http');
const { Duplex } = require('node:stream');

const HEAD_MAX = 1 << 20;
const CLOSED = 1;
const turn = () => new Promise((resolve) => setImmediate(resolve));

// A connection whose peer has sent `bytes` and nothing more yet.
function recorded(bytes) {
  const duplex = new Duplex({ read() {}, write(chunk, encoding, done) { done(); } });
  duplex.on('error', () => {});
  if (bytes.length) duplex.push(bytes);
  return duplex;
}

const hex = (text) => Buffer.from(text, 'latin1').toString('hex');

function requestJudge() {
  const server = http.createServer({ maxHeaderSize: HEAD_MAX, keepAlive: false });
  server.maxHeadersCount = 0;
  server.timeout = 0;
  const read = (request, response) => {
    const { seen } = request.socket;
    const body = [];
    seen.inside++;
    request.on('data', (bytes) => body.push(bytes));
    request.on('end', () => {
      const hosts = request.rawHeaders.filter((_, i, all) => i % 2 && all[i - 1].toLowerCase() === 'host');
      seen.entries.push([hex(request.method), hex(request.url), hex(hosts.join(' ')), Buffer.concat(body).toString('hex')].join());
      seen.inside--;
      response.end();
    });
    request.on('error', () => {});
  };
  for (const event of ['request', 'checkContinue', 'checkExpectation']) server.on(event, read);
  server.on('clientError', (error, socket) => {
    socket.seen.end ??= error.code === 'HPE_INVALID_EOF_STATE' || error.code === 'ECONNRESET' ? '~' : '!';
  });

  return async (bytes) => {
    const socket = recorded(bytes);
    socket.seen = { entries: [], inside: 0, end: undefined };
    const ended = new Promise((resolve) => socket.once('close', resolve));
    server.emit('connection', socket);
    for (let i = 0; i < 4; i++) await turn();
    const inside = socket.seen.inside;
    if (!socket.destroyed) socket.push(null);
    await turn();
    await turn();
    socket.destroy();
    await ended;
    return [...socket.seen.entries, socket.seen.end ?? (inside ? '~' : '.')].join(' ');
  };
}

function readResponse(method, ending, bytes) {
  return new Promise((resolve) => {
    const socket = recorded(bytes);
    const request = http.request({ method, host: 'x', maxHeaderSize: HEAD_MAX, createConnection: () => socket });
    let status;
    const over = (text) => {
      resolve(text);
      request.destroy();
      socket.destroy();
    };
    const cut = () => over(status ? `${status}:cut` : 'none');
    request.on('error', cut);
    request.on('response', (response) => {
      const body = [];
      status = response.statusCode;
      response.on('data', (piece) => body.push(piece));
      response.on('error', cut);
      response.on('aborted', cut);
      response.on('end', () => (response.complete ? over(`${status}:${Buffer.concat(body).toString('hex')}`) : cut()));
    });
    request.on('upgrade', cut);
    request.end();
    (async () => {
      for (let i = 0; i < 4; i++) await turn();
      if (ending === CLOSED && !socket.destroyed) socket.push(null);
      for (let i = 0; i < 4; i++) await turn();
      cut();
    })();
  });
}

async function readResponses(frame) {
  const outcomes = [];
  for (let at = 0; at < frame.length;) {
    const [size, ending, length] = [frame[at], frame[at + 1], frame.readUInt32BE(at + 2)];
    const method = frame.toString('latin1', at + 6, at + 6 + size);
    at += 6 + size;
    outcomes.push(await readResponse(method, ending, frame.subarray(at, at + length)));
    at += length;
  }
  return `llhttp=${outcomes.join()}`;
}

async function main() {
  const read = process.argv[2] === 'requests' ? requestJudge() : readResponses;
  let held = [];
  let size = 0;
  for await (const piece of process.stdin) {
    held.push(piece);
    size += piece.length;
    if (size < 4) continue;
    let bytes = Buffer.concat(held);
    while (bytes.length >= 4 && bytes.length >= 4 + bytes.readUInt32BE(0)) {
      const length = bytes.readUInt32BE(0);
      process.stdout.write(`${await read(bytes.subarray(4, 4 + length))}\n`);
      bytes = bytes.subarray(4 + length);
    }
    held = [bytes];
    size = bytes.length;
  }
}

main();
