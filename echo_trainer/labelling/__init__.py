"""
What a teacher knows, carried over: prompts without answers, answered by the echo pass, for the plain path to learn.

    prompts as text or messages                        [prompts]
    the teacher: echo pass, plain pass, or the base    [teacher]
      n answers to each, greedy or sampled; a vote     [vote]
      confidence, and distributions at its tokens      [teacher]
    labels.jsonl: every answer with its scores         [label]
    labelled and taught rows, so many of each a batch  [mixture]
    the loss on a teacher's distributions              [soft]
    a second, ordinary training on them                [phase]

Labelling is a step from file to file that goes on where it was stopped. Training on what it gave is an ordinary run of
`EchoSFTTrainer` without an echo.
"""
