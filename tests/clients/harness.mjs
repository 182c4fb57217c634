// What every client test stands on: child processes, a relay that sees the upstream side, and checks that are counted.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import readline from 'node:readline';

export const KEY = 'sk-clients-0123456789abcdef';
export const WRONG_KEY = 'sk-wrong-0123456789abcdef';
// What a stream looks like, told to the model by header fields that every client can send.
export const SPACED = { 'X-Test-Events': '12', 'X-Test-Gap-Ms': '30' };
export const ENDLESS = { 'X-Test-Events': '400', 'X-Test-Gap-Ms': '30' };
export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

const TEST_MS = 20_000;
const START_MS = 15_000;
const children = new Set();
const score = { passed: 0, failed: 0 };

export function within(ms, what, promise) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what}: not within ${ms} ms`)), ms);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

// What went wrong, and where in the tests.
function reason(error) {
  const where = error.stack?.split('\n').find((line) => line.includes('.mjs') && !line.includes('node_modules'));
  return [error.message, error.cause?.message, where?.trim()].filter(Boolean).flatMap((text) => text.split('\n'));
}

export async function test(name, body) {
  try {
    await within(TEST_MS, 'test', body());
    score.passed++;
    console.log(`ok      ${name}`);
  } catch (error) {
    score.failed++;
    console.log([`FAILED  ${name}`, ...reason(error)].join('\n        '));
  }
}

export function summary() {
  console.log(`${score.passed} passed, ${score.failed} failed`);
  return score.failed === 0 && score.passed > 0 ? 0 : 1;
}

// A child whose lines (both streams) are kept; line(pattern) waits for the first one, old or new, that matches.
class Child {
  constructor(command, args, options = {}) {
    this.name = path.basename(command);
    this.lines = [];
    this.waiting = [];
    this.process = spawn(command, args, { stdio: ['ignore', 'pipe', 'pipe'], ...options });
    this.ended = new Promise((resolve) => this.process.once('close', resolve));
    this.process.once('error', (error) => this.keep(`cannot start: ${error.message}`));
    for (const stream of [this.process.stdout, this.process.stderr]) {
      readline.createInterface({ input: stream }).on('line', (line) => this.keep(line));
    }
    children.add(this);
  }

  keep(line) {
    this.lines.push(line);
    this.waiting = this.waiting.filter(({ pattern, resolve }) => {
      const match = pattern.exec(line);
      if (match) resolve(match);
      return !match;
    });
  }

  line(pattern, ms = START_MS) {
    const old = this.lines.map((line) => pattern.exec(line)).find(Boolean);
    if (old) return Promise.resolve(old);
    const found = new Promise((resolve) => this.waiting.push({ pattern, resolve }));
    const gone = this.ended.then(() => {
      throw new Error(`${this.name} ended before ${pattern}: ${this.lines.slice(-5).join(' | ')}`);
    });
    return within(ms, `${this.name}: ${pattern}`, Promise.race([found, gone]));
  }

  // The first TERM drains, the second one stops at once.
  async stop() {
    for (const signal of ['SIGTERM', 'SIGTERM', 'SIGKILL']) {
      if (this.process.exitCode === null && this.process.signalCode === null) this.process.kill(signal);
      await Promise.race([this.ended, sleep(signal === 'SIGTERM' ? 300 : 5000)]);
    }
    children.delete(this);
  }
}

export async function stopAll() {
  await Promise.all([...children].map((child) => child.stop()));
}

export function killAll() {
  for (const child of children) child.process.kill('SIGKILL');
}

export function start(command, args, options) {
  return new Child(command, args, options);
}

export async function startTinyauth(binary, keys, upstreamPort, extra = ['--ip-rate', 'off']) {
  const args = ['-k', keys, '-l', '127.0.0.1:0', '-u', `127.0.0.1:${upstreamPort}`, '-w', '2', ...extra];
  const child = start(binary, args);
  const [, port] = await child.line(/event=listening addr=127\.0\.0\.1:(\d+)/);
  await child.line(/event=ready/);
  return { child, url: `http://127.0.0.1:${port}`, host: `127.0.0.1:${port}` };
}

export function writeKeys() {
  const directory = fs.mkdtempSync(path.join(os.tmpdir(), 'tinyauth-clients-'));
  const keys = path.join(directory, 'keys');
  fs.writeFileSync(keys, `alice ${KEY}\n`, { mode: 0o600 });
  return { directory, keys };
}

async function listen(server) {
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return server.address().port;
}

export async function closedPort() {
  const server = net.createServer();
  const port = await listen(server);
  server.close();
  await once(server, 'close');
  return port;
}

// However it ends: once() of node:events takes a reset for a failure.
const closing = (socket) => new Promise((resolve) => socket.once('close', resolve));

// A model that takes requests and never says a word.
export class Silent {
  constructor() {
    this.server = net.createServer((socket) => {
      socket.on('error', () => {});
      socket.once('data', () => this.heard({ closed: closing(socket) }));
    });
    this.request = new Promise((resolve) => (this.heard = resolve));
  }

  async listen() {
    this.port = await listen(this.server);
    return this;
  }

  close() {
    this.server.close();
  }
}

// Stands between tinyauth and the model and keeps what tinyauth did: connections, request lines, ends.
export class Relay {
  constructor(target) {
    this.target = target;
    this.connections = [];
    this.server = net.createServer((socket) => this.join(socket));
  }

  async listen() {
    this.port = await listen(this.server);
    return this;
  }

  join(client) {
    const model = net.connect(this.target, '127.0.0.1');
    const connection = { sent: [], answered: 0, closed: closing(client) };
    this.connections.push(connection);
    client.on('data', (bytes) => connection.sent.push(bytes));
    model.on('data', () => (connection.answered = performance.now()));
    client.pipe(model).pipe(client);
    for (const [one, other] of [[client, model], [model, client]]) {
      one.on('error', () => other.destroy());
      one.on('close', () => other.destroy());
      one.setNoDelay(true);
    }
  }

  // The connection on which the model spoke last: the stream that a test is reading.
  latest() {
    return this.connections.reduce((a, b) => (b.answered > a.answered ? b : a));
  }

  // Every byte that tinyauth ever sent upstream.
  sent() {
    return Buffer.concat(this.connections.flatMap((connection) => connection.sent)).toString('latin1');
  }

  requests() {
    return this.sent().match(/^[A-Z]+ \S+ HTTP\/1\.1\r$/gm)?.length ?? 0;
  }

  close() {
    this.server.close();
  }
}

export async function arrivals(stream) {
  const times = [];
  for await (const _ of stream) times.push(performance.now());
  return times;
}

const gaps = (times) => times.slice(1).map((time, i) => time - times[i]);

// How many events came on their own: so much later than the one before that they cannot have shared one write.
const apart = (times) => gaps(times).filter((gap) => gap >= 5).length;
const spread = (times) => times.at(-1) - times[0];

function checkSpacing(through, straight) {
  if (apart(straight) < 5) throw new Error('the model itself does not space its events: this test shows nothing');
  if (through.length !== straight.length) {
    throw new Error(`${straight.length} events were sent and ${through.length} came`);
  }
  if (apart(through) < apart(straight) * 0.9 || spread(through) < spread(straight) * 0.8) {
    throw new Error(`events came in lumps: ${gaps(through).map(Math.round)} ms between them`);
  }
}

// A stream through tinyauth must be spaced like the same stream straight from the model. A proxy that holds events back
// does so each time; a machine that was busy does not: one of five tries must do.
export async function sameSpacing(times, url, straight) {
  for (let left = 4; ; left--) {
    try {
      return checkSpacing(await times(url), await times(straight));
    } catch (error) {
      if (left === 0) throw error;
    }
  }
}
