"""
What an echo step costs beside a step of `trl.SFTTrainer` with plain LoRA.

    one variant, step by step             [step, tokenizer]
    all of them, interleaved in one run   [compare]
"""
