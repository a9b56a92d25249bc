"""Whether a backend computes what torch computes in FP32."""
