"""A card that is not here: images from the CPU, times and energy from a model of the card."""

VERSION = 3
"""The model's version, in every row that it makes. Rows of an older one are superseded.

1: fitted to the Standard card alone. Where SDXL was then found to have been measured, at 1024 px on
   Pro and Ultra cards, it was 2.5 to 2.7 times too fast.
2: fitted to SDXL's rows too. Convolutions exchanged activations in the model and not in its fit, a
   rate rested on the whole peak, and SDXL's rows counted five times.
3: what convolutions exchange is counted in the fit, the scores of attention and the exchange are
   mixed by their likelihood, and switching is given once a turn and at each program.
"""
