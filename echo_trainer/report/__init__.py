"""
What a finished run says about itself.

    configuration, data, metrics, cost, provenance   [record]
    what its prompts look like                       [prompt_format]
    the model card, from the record alone            [render]
    record, curves and card beside the adapter       [folder]
    beside an adapter in another form                [renew]
"""
