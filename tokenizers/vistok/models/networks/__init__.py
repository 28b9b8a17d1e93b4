"""Pretrained networks that images are looked at through; `nn/network.py` is their contract."""
