"""torch's SGD and AdamW with the MAS penalty inside the step: θ, its state, Ω and θ* are read once.

```python
optimizer = mas_fast.optim.AdamW(model.parameters(), lr=1e-3, mas=mas)
loss.backward()                        # of the loss alone: the optimizer adds the penalty
optimizer.step()
optimizer.penalty                      # λ Σ Ω (θ − θ*)² before the step
```
"""

from mas_fast.optim.adamw import AdamW
from mas_fast.optim.sgd import SGD

__all__ = ["SGD", "AdamW"]
