"""The ground floor: errors, values, names, outputs, geometry."""
