"""The passes of a step over a causal language model of transformers.

[setup] the parts of a model; [plain] the ordinary forward and what it leaves behind; [echo] the echo pass, [suffix] or
[full]; [injection] adds the echo; [head] logits by the model's own forward; [step] all of it in one forward; [proof]
and [rounding] whether a pass is exact on this model.
"""
