"""
Layer selection: the layers that change the representation of your data most, by CKA.

    samples of the data, one pass of the frozen model     [samples, representations]
    similarity of neighbouring layers                     [cka]
    the layers, and how far each choice can be trusted    [select]
    as targets of LoRA                                    [lora_config]
    as sources and targets of echoes; baselines           [use]
    a picture                                             [plot]
"""

from .select import LayerSelection, choose_layers, select_layers

__all__ = ["LayerSelection", "choose_layers", "select_layers"]
