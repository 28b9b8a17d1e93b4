"""What every layer may use: errors, values, names, outputs, geometry."""
