"""
A run described in YAML: found by name [find], read [read], looked at before anything is loaded [check], turned into
TRL's argument classes and ours [arguments], with its data [data], and trained [training].

Whoever needs a recipe takes it from here: `echo-trainer sft`, `select-layers` and `ablate` read it alike.
"""
