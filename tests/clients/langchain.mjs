// LangChain's ChatOpenAI, set up as in the usual recipe: base URL, API key, streaming.
import assert from 'node:assert/strict';
import { ChatOpenAI } from '@langchain/openai';
import ranks from 'js-tiktoken/ranks/cl100k_base';
import { arrivals, KEY, sameSpacing, SPACED, WRONG_KEY } from './harness.mjs';

// invoke() with streaming counts tokens with a table from the net; this one is on the disk, so that nothing leaves the machine.
const loopback = globalThis.fetch;
globalThis.fetch = (resource, ...rest) => (
  new URL(resource.url ?? resource).hostname === '127.0.0.1' ? loopback(resource, ...rest) : Promise.resolve(Response.json(ranks)));

function chat(base, apiKey = KEY, options = {}) {
  return new ChatOpenAI({
    model: 'stand-in', apiKey, configuration: { baseURL: `${base}/v1`, defaultHeaders: SPACED }, ...options,
  });
}

export async function langchainTests({ test, url, straight, limited }) {
  await test('langchain: invoke is answered', async () => {
    const answer = await chat(url).invoke('hello');
    assert.ok(answer.content.length > 0);
  });

  await test('langchain: invoke with streaming on equals the one straight from the model', async () => {
    const answer = await chat(url, KEY, { streaming: true }).invoke('hello');
    assert.ok(answer.content.length > 0);
    assert.equal(answer.content, (await chat(straight, KEY, { streaming: true }).invoke('hello')).content);
  });

  await test('langchain: stream brings each part as its own', async () => {
    const times = async (base) => arrivals(await chat(base, KEY, { streaming: true }).stream('hello'));
    await sameSpacing(times, url, straight);
  });

  await test('langchain: a wrong key fails at once with our message', async () => {
    const error = await chat(url, WRONG_KEY).invoke('hello').catch((reason) => reason);
    assert.equal(error.status, 401);
    assert.match(error.message, /^401 .*key/i);
  });

  await test('langchain: rate limits are waited out', async () => {
    const model = chat(limited, KEY, { maxRetries: 6 });
    for (let i = 0; i < 4; i++) assert.ok((await model.invoke('hello')).content.length > 0);
  });
}
