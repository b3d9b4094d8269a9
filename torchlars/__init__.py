"""LARS for PyTorch: a layer-wise adaptive learning rate around any optimizer, in one line.

>>> optimizer = LARS(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4))
"""

from torchlars import optim
from torchlars.groups import param_groups
from torchlars.lamb import LAMB
from torchlars.lars import LARC, LARS
from torchlars.percentile_clipping import PercentileClipping

__all__ = ["LAMB", "LARC", "LARS", "PercentileClipping", "__version__", "optim", "param_groups"]
__version__ = "1.0.0.dev0"
