"""Recovery: what a pruned model learns back from the dense one, or from text, by training.

`teacher` keeps what the dense model predicts, so that it never stands beside the student; `loss`
compares with it; `deltas` is what is trained, added to the student inside each step; `forward` runs
the student with it; `fit` trains end to end, `layerwise` one layer after the other.
"""
