"""Which cell to take within limits: the language of limits, contenders, the decision."""
