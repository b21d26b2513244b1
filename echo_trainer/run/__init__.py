"""What a training run needs around its steps: plain classes that the trainer owns.

[collate] and [answers] batches, [draft] their routes and [batches] their plans; [pass_choice], [proof_rows] and
[agreement] which form the echo pass takes; [guard] and [scaler] nothing that is not finite reaches a weight;
[metrics]; [checkpoints], [checkpoint_files] and [resume]; [save] and [final_save] the final adapter; [pushes] what
goes to the Hub; [validation] what is refused; [host] what they need of the trainer.
"""
