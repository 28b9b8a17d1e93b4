"""TA-TiTok."""
