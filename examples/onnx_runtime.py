"""Write an ONNX graph and run it in ONNX Runtime, without PyTorch while it generates.

Needs the extra onnx: pip install '.[onnx]' in a clone
"""

from pathlib import Path

from tokenizers import Tokenizer

import spp_export
from spp_export.ort import OrtModel, generate

SCENARIO = Path(__file__).with_name("chemistry.txt")

result = spp_export.export(SCENARIO, format="onnx", output="out/chemistry-onnx", force=True)

model = OrtModel.load(result.path)
tokenizer = Tokenizer.from_file(str(result.path / "tokenizer.json"))
end = tokenizer.token_to_id("<|im_end|>")

# Two prompts of different lengths in one batch.
questions = ("What is an acid?", "Name three noble gases and one use of each.")
prompts = [
    tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").ids
    for question in questions
]
steps = list(generate(model, prompts, max_new_tokens=40, eos=[end]))

for row, question in enumerate(questions):
    answer = [step[row] for step in steps if step[row] is not None]
    print(f"{question}\n{tokenizer.decode(answer)}\n")
