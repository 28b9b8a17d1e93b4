"""Vector quantizers and their kin: the maths, torch only."""
