// Usage: node main.mjs TINYAUTH PYTHON. Runs every client test once in front of each upstream and prints the score.
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import {
  closedPort, killAll, Relay, Silent, start, startTinyauth, stopAll, summary, test, writeKeys,
} from './harness.mjs';
import { curlTests } from './curl.mjs';
import { langchainTests } from './langchain.mjs';
import { ollamaTests } from './ollama.mjs';
import { openaiTests } from './openai.mjs';

const here = path.dirname(fileURLToPath(import.meta.url));
const [binary, python] = process.argv.slice(2);

const upstreams = {
  model: {
    args: [path.join(here, '..', 'model.py'), '--port', '0'],
    port: /port=(\d+)/,
  },
  uvicorn: {
    args: ['-m', 'uvicorn', '--app-dir', here, '--port', '0', '--no-access-log', 'app:app'],
    port: /Uvicorn running on http:\/\/127\.0\.0\.1:(\d+)/,
  },
};

async function quietLog(children) {
  for (const { child } of children) {
    const odd = child.lines.filter((line) => !/^time=\S+ (event|addr)=/.test(line));
    if (odd.length) throw new Error(`stderr holds: ${odd.join(' | ')}`);
  }
}

async function suite(name, keys) {
  const environment = { ...process.env, PYTHONDONTWRITEBYTECODE: '1', PYTHONUNBUFFERED: '1' };
  const model = start(python, upstreams[name].args, { env: environment });
  const [, port] = await model.line(upstreams[name].port);
  const relay = await new Relay(Number(port)).listen();
  const open = await startTinyauth(binary, keys, relay.port);
  const limited = await startTinyauth(binary, keys, relay.port, ['--ip-rate', '2/s', '--ip-burst', '1']);
  const silent = await new Silent().listen();
  const mute = await startTinyauth(binary, keys, silent.port);
  const down = await startTinyauth(binary, keys, await closedPort());
  const context = {
    url: open.url, host: open.host, log: open.child, limited: limited.url, down: down.url, mute: mute.url,
    silent, relay,
    straight: `http://127.0.0.1:${port}`,
    test: (what, body) => test(`${name}: ${what}`, body),
  };
  for (const tests of [openaiTests, langchainTests, ollamaTests, curlTests]) await tests(context);
  await context.test('stderr of tinyauth holds log lines only', () => quietLog([open, limited, mute, down]));
  relay.close();
  silent.close();
  await stopAll();
}

process.on('exit', killAll);
const { directory, keys } = writeKeys();
try {
  for (const name of Object.keys(upstreams)) {
    await suite(name, keys).catch((error) => test(`${name}: suite`, () => Promise.reject(error)));
    await stopAll();
  }
} finally {
  fs.rmSync(directory, { recursive: true });
}
process.exit(summary());
