"""Models written by the authors of Visual Mambas, on this package's operators in place of their CUDA extensions.

    with ptq4vm.authors.stand_ins():
        from models_mamba import VisionMamba        # the authors' file, as it is
        model = VisionMamba(...)
        quantized = ptq4vm.quantize(model, loader)

`catalogue.py` is the table of the modules and names that are stood in for. The functions follow the signatures and
shapes of the originals: B images, E channels, S states, L tokens, G groups of B and C; channels come before tokens.
"""

from ptq4vm.authors.context import stand_ins as stand_ins
from ptq4vm.authors.replacements import extensions_replaced as extensions_replaced
