"""Two slim models in one process. They share every tensor that their plans leave untouched."""

from pathlib import Path

import spp_export

HERE = Path(__file__).parent

# A plan says what to keep. It takes a few kilobytes, and can be written to a file and read again.
plans = {
    name: spp_export.plan(HERE / f"{name}.txt", keep=0.7).plan for name in ("chemistry", "history")
}
models = spp_export.load_many("demo", plans)

each = sum(parameter.nbytes for parameter in models["chemistry"].parameters())
print(f"one model: {each / 1e6:.0f} MB, both together: {models.nbytes / 1e6:.0f} MB")

for question in ("Which indicator do I need for a weak acid?", "Who signed the Magna Carta?"):
    name = models.pick(question)  # the scenario whose domains are closest to the question's
    print(f"{question} -> {name}, a {type(models[name]).__name__}")
