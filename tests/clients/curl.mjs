// curl, as people type it.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { KEY, sameSpacing, SPACED, WRONG_KEY } from './harness.mjs';

const bearer = ['-H', `Authorization: Bearer ${KEY}`];
const chat = (extra = {}) => JSON.stringify({ model: 'stand-in', messages: [{ role: 'user', content: 'hello' }], ...extra });
const spaced = Object.entries(SPACED).flatMap(([name, value]) => ['-H', `${name}: ${value}`]);
const untimed = (text) => text.replace(/"t_ns": \d+/g, '"t_ns": 0');
const json = (body) => ['-H', 'Content-Type: application/json', '-d', body];

// Runs curl to its end; times holds when each piece of the output came.
async function curl(args, input) {
  const child = spawn('curl', ['-q', '-sS', '--noproxy', '*', '--max-time', '20', ...args]);
  const result = { out: '', err: '', times: [] };
  child.stdout.on('data', (bytes) => {
    result.out += bytes.toString('latin1');
    result.times.push(performance.now());
  });
  child.stderr.on('data', (bytes) => (result.err += bytes.toString('latin1')));
  child.stdin.on('error', () => {});
  child.stdin.end(input);
  [result.status] = await once(child, 'close');
  return result;
}

async function statusOf(args) {
  const { out, err, status } = await curl(['-o', '/dev/null', '-w', '%{http_code}', ...args]);
  assert.equal(status, 0, err);
  return Number(out);
}

async function streamTests({ test, url, straight }) {
  await test('curl: -N shows each event of a stream as its own', async () => {
    const events = async (base) => curl(['-N', ...bearer, ...spaced, ...json(chat({ stream: true })), `${base}/v1/chat/completions`]);
    const [through, direct] = [await events(url), await events(straight)];
    assert.equal(untimed(through.out), untimed(direct.out));
    await sameSpacing(async (base) => (await events(base)).times, url, straight);
  });

  await test('curl: an HTTP/1.0 client gets the stream unchunked, and its end by close', async () => {
    const events = async (base, ...args) => curl([...args, ...bearer, ...json(chat({ stream: true })), `${base}/v1/chat/completions`]);
    const old = await events(url, '-0', '-i');
    assert.equal(old.status, 0, old.err);
    const [head, body] = old.out.split(/\r\n\r\n([^]*)/);
    assert.match(head, /^HTTP\/1\.[01] 200/);
    assert.doesNotMatch(head, /^transfer-encoding:/im);
    assert.equal(untimed(body), untimed((await events(straight)).out));
  });
}

async function uploadTests({ test, url, relay }) {
  const big = chat({ padding: 'x'.repeat(3 << 20) });
  const upload = ['-v', '--expect100-timeout', '8', '-H', 'Content-Type: application/json', '--data-binary', '@-',
    '-o', '/dev/null', '-w', '%{http_code} %{size_upload} %{time_total}'];

  await test('curl: an upload of 3 MB with Expect: 100-continue is told to go on', async () => {
    const { out, err } = await curl([...upload, ...bearer, '-H', 'Expect: 100-continue', `${url}/v1/chat/completions`], big);
    const [code, size, seconds] = out.split(' ').map(Number);
    assert.equal(code, 200, err);
    assert.equal(size, big.length);
    assert.match(err, /^< HTTP\/1\.1 100/m);
    assert.ok(seconds < 8, `took ${seconds} s: curl gave up waiting for the 100`);
  });

  await test('curl: a chunked upload of 3 MB passes', async () => {
    const { out, err } = await curl([...upload, ...bearer, '-H', 'Transfer-Encoding: chunked', `${url}/v1/chat/completions`], big);
    assert.match(out, /^200 /, err);
  });

  await test('curl: a refused upload with Expect ends with 401, no 100 and no body sent', async () => {
    const before = relay.requests();
    const wrong = ['-H', `Authorization: Bearer ${WRONG_KEY}`, '-H', 'Expect: 100-continue'];
    const { out, err } = await curl([...upload, ...wrong, `${url}/v1/chat/completions`], big);
    assert.match(out, /^401 0 /, err);
    assert.doesNotMatch(err, /^< HTTP\/1\.1 100/m);
    assert.equal(relay.requests(), before);
  });

  await test('curl: a refused upload without Expect still shows its 401', async () => {
    const { out, err } = await curl([...upload, '-H', 'Expect:', `${url}/v1/chat/completions`], big);
    assert.match(out, /^401 /, err);
  });
}

async function keyTests({ test, url, host, relay }) {
  const models = `${url}/v1/models`;
  const accepted = {
    'Authorization: Bearer': [...bearer, models],
    'authorization: bEARER': ['-H', `authorization: bEARER ${KEY}`, models],
    'X-Api-Key': ['-H', `X-Api-Key: ${KEY}`, models],
    'Api-Key': ['-H', `Api-Key: ${KEY}`, models],
    'user:pass@host': [`http://user:${KEY}@${host}/v1/models`],
  };
  for (const [name, args] of Object.entries(accepted)) {
    await test(`curl: a key as ${name} is accepted, and does not go upstream`, async () => {
      assert.equal(await statusOf(args), 200);
      const sent = relay.sent();
      assert.ok(!sent.includes(KEY) && !sent.includes(Buffer.from(`user:${KEY}`).toString('base64')));
      assert.doesNotMatch(sent, /^(authorization|x-api-key|api-key):/im);
    });
  }

  const refused = {
    'no key': [models],
    'a wrong key': ['-H', `Authorization: Bearer ${WRONG_KEY}`, models],
    'the key without its last character': ['-H', `Authorization: Bearer ${KEY.slice(0, -1)}`, models],
    'the key in capitals': ['-H', `Authorization: Bearer ${KEY.toUpperCase()}`, models],
    'the key in the query': [`${models}?key=${KEY}`],
    'a wrong password in user:pass@host': [`http://${KEY}:wrong@${host}/v1/models`],
  };
  for (const [name, args] of Object.entries(refused)) {
    await test(`curl: ${name} is 401 and nothing goes upstream`, async () => {
      const before = relay.requests();
      assert.equal(await statusOf(args), 401);
      assert.equal(relay.requests(), before);
    });
  }
}

async function connectionTests({ test, url, relay }) {
  await test('curl: two requests share one connection to us, and have one each to the upstream', async () => {
    const before = relay.connections.length;
    const { out, err } = await curl([...bearer, '-o', '/dev/null', '-o', '/dev/null', '-w', '%{http_code} %{num_connects}\n',
      `${url}/v1/models`, `${url}/v1/models`]);
    assert.equal(out, '200 1\n200 0\n', err);
    assert.equal(relay.connections.length, before + 2);
  });

  await test('curl: --path-as-is reaches the upstream as it was typed', async () => {
    await statusOf([...bearer, '--path-as-is', `${url}/v1/../v1/./models?a=%2e%2E&b=c?d`]);
    assert.match(relay.sent(), /^GET \/v1\/\.\.\/v1\/\.\/models\?a=%2e%2E&b=c\?d HTTP\/1\.1\r$/m);
  });

  await test('curl: /health wants no key, and no other spelling of it passes for it', async () => {
    const health = await curl(['-w', ' %{http_code}', `${url}/health`]);
    assert.match(health.out, /^OK\s* 200$/);
    for (const path of ['/health/', '/health/../v1/models', '/./health', '//health', '/%68ealth/..', '/healthz', '/HEALTH']) {
      assert.equal(await statusOf(['--path-as-is', `${url}${path}`]), 401, path);
    }
  });

  await test('curl: -I gets a head and no body', async () => {
    const { out, status, err } = await curl(['-I', ...bearer, `${url}/api/tags`]);
    assert.equal(status, 0, err);
    assert.match(out, /^HTTP\/1\.1 200 .*\r\n([^\r\n]+\r\n)+\r\n$/);
    assert.match(out, /^x-request-id: \S+\r$/im);
  });
}

export async function curlTests(context) {
  for (const tests of [streamTests, uploadTests, keyTests, connectionTests]) await tests(context);
}
