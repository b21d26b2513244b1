"""Everything this package takes from other libraries that is not their public interface, and nothing else.

The ground moves: transformers 5.24 renamed an argument, and a check of names made the suffix pass disappear. So each
thing used here is said with the reason, the versions it was seen in, and what happens when it is gone: an error by
name when a trainer is built, or a fallback that is safe and is said. No module outside this package touches a private
name of another library (`tests/compat/test_compat.py` searches for them).

| file | of | what | when it is gone |
|---|---|---|---|
| `cache` | transformers | where layers take their keys and values; what a `Cache` is asked | full pass, said |
| `replay` | transformers | keys and values from what a layer was given | they are kept, said |
| `checkpointing` | transformers | the function that checkpoints a layer | error by name |
| `trainer` | trl, transformers, accelerate | methods of the trainers without a public hook | error by name |
| `beams` | trl, transformers | how `GRPOTrainer` generates, and what it keeps meanwhile | error by name |
| `preparation` | trl | rows as `SFTTrainer` prepares them, without a trainer | error by name |
| `attention` | transformers | which attention kernel a model runs on | error by name |
| `building` | transformers, accelerate | models without weights; replaced forwards | the auto class is asked |
| `quantized` | bitsandbytes | whether 4-bit weights are packed on a CPU | they are left as they are |
| `identity` | transformers, datasets | where a model or a dataset came from | cards say less |
| `peft` | peft | which modules a LoRA configuration is about | error by name |
| `hub_client` | huggingface_hub | the factory of its HTTP clients | the class of its client |
| `dispatch` | torch | a mode that sees every operation, for counting | error by name |
| `flops` | torch | its formulas by operation; names of attention on a CPU | error by name |
| `versions` | | which releases were tested, and which are installed | |
"""
