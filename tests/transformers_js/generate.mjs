// Greedy generation by transformers.js, offline: node generate.mjs JOBS.json > RESULTS.json
//
// JOBS is a list of {directory, texts, newTokens}; the texts of a job are one batch. RESULTS is a
// list, in the same order, of {prompts, generated}: token ids per text, prompts without padding.

import { readFileSync } from "node:fs";
import { basename, dirname, resolve } from "node:path";

import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

env.allowRemoteModels = false;

async function run({ directory, texts, newTokens }) {
  const path = resolve(directory);
  env.localModelPath = dirname(path);
  const tokenizer = await AutoTokenizer.from_pretrained(basename(path));
  const model = await AutoModelForCausalLM.from_pretrained(basename(path), {
    dtype: "fp32",
    subfolder: "",
  });
  // A generated text is what follows the padded prompt, so the padding must lie before it.
  tokenizer.padding_side = "left";
  const inputs = tokenizer(texts, { padding: texts.length > 1 });
  const output = await model.generate({ ...inputs, max_new_tokens: newTokens, do_sample: false });
  const width = inputs.input_ids.dims[1];
  await model.dispose();
  return {
    prompts: texts.map((text) => tokenizer.encode(text)),
    generated: output.tolist().map((row) => row.slice(width).map(Number)),
  };
}

const results = [];
for (const job of JSON.parse(readFileSync(process.argv[2], "utf8"))) {
  results.push(await run(job));
}
process.stdout.write(JSON.stringify(results));
