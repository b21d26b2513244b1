"""
An adapter on disk: what it is, what engines do with it, and the form they can all read.

    its files, read from their headers               [folder]
    what each engine serves, refuses or gets wrong   [rules, find, find_tensors]
    the verdicts, with the fix                       [check]
    the same function in a form that all serve       [portable, portable_refuse, write]
    what no export can be made of                    [refuse]
    on its base, and how far two models are apart    [logit_error]
"""
