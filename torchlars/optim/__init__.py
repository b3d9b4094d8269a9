"""Base optimizers that take trust ratios into their own update, and the protocol by which any base can.

LARS writes r · (g + λw) into ``.grad`` before the base's step, which reads it once more. LAMB scales what the base's
step has written. A base that *takes trust ratios* multiplies by them in its own update instead, and ``.grad`` stays as
it was. It says so by an attribute, ``takes_trust_ratios`` for those of gradients (LARS, LARC) or
``takes_ratios_of_updates`` for those of updates (LAMB), and its ``step`` takes a keyword ``trust_ratios``, a
:class:`TrustRatios`. Without a wrapper that is None, and the step is the base's plain one.

**Ratios of gradients**::

    class MySGD(torch.optim.Optimizer):
        takes_trust_ratios = True

        @torch.no_grad()
        def step(self, closure=None, *, trust_ratios=None):
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for index, group in enumerate(self.param_groups):
                params = [param for param in group["params"] if param.grad is not None]
                ratios = None if trust_ratios is None else trust_ratios.measure(index, params)
                for i, param in enumerate(params):
                    direction = param.grad + group["weight_decay"] * param
                    param -= group["lr"] * (direction if ratios is None else ratios[i] * direction)
            return loss

LARS hides no weight decay from such a base: λ in r · (g + λw) is the base's own. If its defaults have the flag
``decoupled_weight_decay``, it multiplies g alone in groups where that is set, as :class:`torchlars.optim.AdamW` does.
Groups whose updates are scaled (``apply_to="update"``) and other groups with decoupled weight decay have no ratios
here; LARS adapts them itself. While lr is in the momentum, a group's ``lr`` reads 1.

**Ratios of updates**::

    class MySignSGD(torch.optim.Optimizer):
        takes_ratios_of_updates = True

        @torch.no_grad()
        def step(self, closure=None, *, trust_ratios=None):
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for index, group in enumerate(self.param_groups):
                params = [param for param in group["params"] if param.grad is not None]
                updates = [param.grad.sign() + group["weight_decay"] * param for param in params]
                ratios = None if trust_ratios is None else trust_ratios.measure_updates([(index, params, updates)])[0]
                for i, param in enumerate(params):
                    param -= group["lr"] * (updates[i] if ratios is None else ratios[i] * updates[i])
            return loss

Such a base computes its updates before it writes a parameter, and LAMB keeps no copies of parameters. Updates need not
survive the rounding of a parameter: in bfloat16 they are as precise as the base computes them.

A base that measures by itself, in one pass with its update, asks for ``options`` or ``update_options`` instead, and
hands the ratios to ``report``. It leaves sharded parameters (``DTensor``) to ``measure_all``, ``measure_updates`` or
``decide_updates``, which sum their norms over the ranks. A base may have both attributes: it is asked for ratios of one
kind at a time, and the methods of the other kind return None. A base with parameters of several devices or dtypes in a
group asks for those of each. A subclass whose ``step`` does not accept the keyword sets the attribute to False, and is
adapted as any other base.
"""

from torchlars.optim.adam import Adam, AdamW
from torchlars.optim.protocol import TrustRatios
from torchlars.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "TrustRatios"]
