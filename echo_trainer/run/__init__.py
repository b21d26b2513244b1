"""What a training run needs around its steps: plain classes that the trainer owns.

[collate] and [deferred] batches and their routes; [pass_choice], [proof_rows] and [agreement] which form the echo pass
takes; [guard] nothing that is not finite reaches a weight; [metrics]; [checkpoint], [checkpoint_files] and [resume];
[saving] and [final_save] the final adapter; [hub_mixin] pushes; [validation] what is refused.
"""
