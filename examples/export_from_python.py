"""Export a model for a scenario from Python, look at the result, and load it with transformers."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import spp_export

SCENARIO = Path(__file__).with_name("chemistry.txt")

# The same options as `spp export --scenario chemistry.txt --keep 0.8 -o out/chemistry --force`.
result = spp_export.export(SCENARIO, keep=0.8, output="out/chemistry", force=True)

for layer, kept in enumerate(result.plan.layers[:3]):
    print(f"layer {layer}: query heads {kept.query_heads}, KV heads {kept.kv_heads}")

# `import spp_export` has registered the classes, so trust_remote_code is not needed.
model = AutoModelForCausalLM.from_pretrained(result.path)
tokenizer = AutoTokenizer.from_pretrained(result.path)

question = [{"role": "user", "content": "What is an acid?"}]
inputs = tokenizer.apply_chat_template(
    question, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
