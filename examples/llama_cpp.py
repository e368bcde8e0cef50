"""Write a GGUF file with 8-bit weights and run it in llama.cpp.

Needs the extra gguf: pip install '.[gguf]' in a clone. The file works in any recent llama.cpp,
for example `llama-cli -m out/chemistry-gguf/model.gguf`; this script uses the package xllamacpp.
"""

from pathlib import Path

import xllamacpp

import spp_export

SCENARIO = Path(__file__).with_name("chemistry.txt")

result = spp_export.export(
    SCENARIO, format="gguf", quant="q8_0", output="out/chemistry-gguf", force=True
)

parameters = xllamacpp.CommonParams()
parameters.model.path = str(result.path / "model.gguf")
parameters.n_ctx = 1024
parameters.n_gpu_layers = 0
parameters.verbosity = 0
parameters.no_extra_bufts = True  # repacked weights crash on some processors
server = xllamacpp.Server(parameters)

answer = server.handle_chat_completions(
    {
        "messages": [{"role": "user", "content": "What is an acid?"}],
        "max_tokens": 40,
        "temperature": 0,
    }
)
print(answer["choices"][0]["message"]["content"])
