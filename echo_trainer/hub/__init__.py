"""
Pushing a finished run to the Hub.

    which files, and nothing else       [files]
    one upload, tried again, verified   [push, client]
"""
