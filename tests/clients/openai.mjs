// The OpenAI SDK for JavaScript.
import assert from 'node:assert/strict';
import OpenAI from 'openai';
import { arrivals, ENDLESS, KEY, sameSpacing, SPACED, within, WRONG_KEY } from './harness.mjs';

const messages = [{ role: 'user', content: 'hello' }];
const plain = { model: 'stand-in', messages };
const streamed = { ...plain, stream: true };
const endless = { headers: ENDLESS };

// A client that keeps every HTTP answer which its own retries hide.
function client(base, apiKey = KEY, options = {}) {
  const answers = [];
  const counting = async (...args) => {
    const answer = await fetch(...args);
    answers.push({ status: answer.status, headers: answer.headers, at: performance.now() });
    return answer;
  };
  const openai = new OpenAI({ baseURL: `${base}/v1`, apiKey, fetch: counting, ...options });
  return { openai, answers };
}

const accessLine = (id) => new RegExp(`^.* id=${id}( .*)?$`);

async function failure(promise) {
  return promise.then(() => assert.fail('the call succeeded'), (error) => error);
}

async function chatTests({ test, url, straight }) {
  await test('openai: a plain chat is answered', async () => {
    const { openai, answers } = client(url);
    const completion = await openai.chat.completions.create(plain);
    assert.ok(completion.choices[0].message.content.length > 0);
    assert.equal(completion.object, 'chat.completion');
    assert.equal(answers.length, 1);
  });

  await test('openai: a streamed chat equals the one straight from the model', async () => {
    const text = async (base) => {
      let whole = '';
      for await (const part of await client(base).openai.chat.completions.create(streamed)) {
        whole += part.choices[0]?.delta?.content ?? '';
      }
      return whole;
    };
    const whole = await text(url);
    assert.ok(whole.length > 0);
    assert.equal(whole, await text(straight));
  });

  await test('openai: each event of a stream arrives as its own', async () => {
    const times = async (base) => arrivals(await client(base).openai.chat.completions.create(streamed, { headers: SPACED }));
    await sameSpacing(times, url, straight);
  });

  await test('openai: models are listed', async () => {
    const ids = [];
    for await (const model of client(url).openai.models.list()) ids.push(model.id);
    assert.ok(ids.length > 0);
  });

  await test('openai: embeddings pass, or the refusal of a model that has none', async () => {
    const embed = async (base) => client(base, KEY, { maxRetries: 0 }).openai.embeddings
      .create({ model: 'stand-in', input: 'hello', encoding_format: 'float' })
      .then((answer) => answer.data[0].embedding, (error) => error.status);
    assert.deepEqual(await embed(url), await embed(straight));
  });

  await test('openai: twenty chats at once are all answered', async () => {
    const { openai } = client(url);
    const all = await Promise.all(Array.from({ length: 20 }, () => openai.chat.completions.create(plain)));
    assert.ok(all.every((completion) => completion.choices.length === 1));
  });
}

async function identityTests({ test, url, log }) {
  await test('openai: the request id is the same in the SDK, the header and the log', async () => {
    const { openai, answers } = client(url);
    const completion = await openai.chat.completions.create(plain);
    const id = answers[0].headers.get('x-request-id');
    assert.ok(id);
    assert.equal(completion._request_id, id);
    const [line] = await log.line(accessLine(id));
    assert.match(line, / key=alice method=POST path=\/v1\/chat\/completions status=200 /);
  });
}

async function refusalTests({ test, url, down, relay }) {
  await test('openai: a wrong key is an AuthenticationError with our message, and is not tried again', async () => {
    const before = relay.requests();
    const { openai, answers } = client(url, WRONG_KEY);
    const error = await failure(openai.chat.completions.create(plain));
    assert.ok(error instanceof OpenAI.AuthenticationError);
    assert.equal(error.status, 401);
    assert.equal(error.code, 'invalid_api_key');
    assert.equal(error.message, `401 ${error.error.message}`);
    assert.match(error.error.message, /key/i);
    assert.ok(!error.message.includes(WRONG_KEY));
    assert.equal(error.requestID, answers[0].headers.get('x-request-id'));
    assert.equal(answers.length, 1);
    assert.equal(relay.requests(), before);
  });

  await test('openai: a wrong key refuses a stream before it begins', async () => {
    const error = await failure(client(url, WRONG_KEY).openai.chat.completions.create(streamed));
    assert.ok(error instanceof OpenAI.AuthenticationError);
  });

  await test('openai: an upstream that is down is a 502 whose message the SDK shows', async () => {
    const error = await failure(client(down, KEY, { maxRetries: 0 }).openai.chat.completions.create(plain));
    assert.ok(error instanceof OpenAI.InternalServerError);
    assert.equal(error.status, 502);
    assert.equal(error.message, `502 ${error.error.message}`);
    assert.match(error.error.message, /127\.0\.0\.1:\d+/);
    assert.ok(error.requestID);
  });
}

// Sends one request after the other until one of them met a 429.
async function untilLimited({ openai, answers }) {
  for (let i = 0; i < 20; i++) {
    const completion = await openai.chat.completions.create(plain);
    assert.equal(completion.object, 'chat.completion');
    if (answers.some((answer) => answer.status === 429)) return;
  }
  assert.fail('no 429 came in 20 requests');
}

async function rateTests({ test, limited }) {
  await test('openai: a 429 is tried again after the delay it names, and succeeds', async () => {
    const counted = client(limited);
    await untilLimited(counted);
    const at = counted.answers.findIndex((answer) => answer.status === 429);
    const [refused, next] = counted.answers.slice(at, at + 2);
    const delay = Number(refused.headers.get('retry-after-ms'));
    assert.ok(delay > 0 && delay <= 1000, `retry-after-ms is ${delay}`);
    assert.ok(Number(refused.headers.get('retry-after')) >= 1);
    assert.equal(next.status, 200);
    const waited = next.at - refused.at;
    assert.ok(waited >= delay - 2 && waited < delay + 400, `waited ${waited} ms, told ${delay} ms`);
  });

  await test('openai: a 429 without retries is a RateLimitError with our message', async () => {
    const { openai } = client(limited, KEY, { maxRetries: 0 });
    const attempts = Array.from({ length: 6 }, () => openai.chat.completions.create(plain));
    const errors = (await Promise.allSettled(attempts)).filter((one) => one.status === 'rejected');
    assert.ok(errors.length >= 3);
    for (const { reason } of errors) {
      assert.ok(reason instanceof OpenAI.RateLimitError);
      assert.equal(reason.message, `429 ${reason.error.message}`);
      assert.equal(reason.code, 'rate_limit_exceeded');
    }
  });
}

async function abortTests({ test, url, relay, log, mute, silent }) {
  await test('openai: an aborted stream closes its upstream connection at once', async () => {
    const { openai, answers } = client(url);
    const stream = await openai.chat.completions.create(streamed, endless);
    let events = 0;
    let connection;
    for await (const _ of stream) {
      if (++events < 3) continue;
      connection = relay.latest();
      stream.controller.abort();
      break;
    }
    await within(500, 'upstream connection closed', connection.closed);
    const [line] = await log.line(accessLine(answers[0].headers.get('x-request-id')));
    assert.match(line, / reason=client_closed( |$)/);
  });

  await test('openai: a client that leaves before the answer begins closes the upstream too', async () => {
    const gone = new AbortController();
    const { openai } = client(mute, KEY, { maxRetries: 0 });
    const call = failure(openai.chat.completions.create(streamed, { signal: gone.signal }));
    const { closed } = await silent.request;
    gone.abort();
    assert.ok((await call) instanceof OpenAI.APIUserAbortError);
    await within(500, 'upstream connection closed', closed);
  });
}

export async function openaiTests(context) {
  for (const tests of [chatTests, identityTests, refusalTests, rateTests, abortTests]) await tests(context);
}
