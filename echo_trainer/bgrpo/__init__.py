"""
Rank-aware beam GRPO: GRPO whose group is the beams of one beam search, rewarded by their rank (arXiv 2508.15766).

    a prompt ──> its G beams, best first by summed log-probability      [beams]
    (prompt, completion, row) ──> right or wrong                        [verifier]
    (right, rank, G) ──> reward r_i                                     [rewards, scoring]
    A_i = r_i - mean of the group's; clipped ratio, beta times KL       trl.GRPOTrainer
    what cannot work, said before anything is loaded                    [config, refuse, start]
    the trainer; what a resume needs; its record and card               [trainer, resumption, record]
    accuracy by beam width, before and after                            [accuracy, plot]
    `echo-trainer bgrpo`                                                [arguments, run]

Beams are not samples of the policy. GRPO's gradient is an estimate of that of the expected reward because completions
are drawn from the policy; beams are its G most probable completions, each taken once. The ratio pi / pi_old corrects
for steps taken since they were generated and not for that, in the paper and here. What is optimised is a ranking.
"""
