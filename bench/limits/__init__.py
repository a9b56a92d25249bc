"""What hardware could do: floors, modelled ranges, published figures beside ours."""
