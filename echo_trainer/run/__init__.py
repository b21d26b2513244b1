"""What a training run needs around its steps: plain classes that the trainer owns.

[collate] and [batches] batches and their routes; [pass_choice], [proof_rows] and [agreement] which form the echo pass
takes; [guard] nothing that is not finite reaches a weight; [metrics]; [checkpoints], [checkpoint_files] and [resume];
[save] and [final_save] the final adapter; [pushes] what goes to the Hub; [validation] what is refused; [host] what
they need of the trainer.
"""
