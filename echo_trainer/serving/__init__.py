"""
Serving: what engines do with an adapter, and the forms they can all read.

    an adapter's files, read from their headers      [adapter]
    what each engine serves, refuses or gets wrong   [rules, find, find_tensors]
    the verdicts, with the fix                       [check]
    the same function in a form that all serve       [portable, portable_refuse, portable_write]
    what no export can be made of                    [refuse]
    the record of the run beside an export           [record]
    merged, LoRA from DoRA, GGUF                     [export, export_gguf, logit_error]
"""
