"""`echo-trainer ablate`: which part of Echo-LoRA makes the difference, on your model and data.

    recipe -> plan (arms x adapters x seeds) -> schedule -> worker -> run_one -> results on disk
                                                                                  |
                                                        results -> statistics -> report (Markdown, PNG)

Everything that a report says is computed from the results on disk, so a report can be made again at any time.
"""
