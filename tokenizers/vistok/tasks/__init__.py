"""What is trained, on what data, watched by which number."""
