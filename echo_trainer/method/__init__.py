"""Echo-LoRA itself, in plain torch: no model, no trainer, no transformers.

[segments] answers and boundaries from labels; [routing] which samples; [plan] and [layouts] every index of a step;
[sites] and [depth] where the echo comes from and goes to; [network] from echo to delta; [losses]; [rows] and [silence]
gradients that are copied, and gradients that are zero.
"""
