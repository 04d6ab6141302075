"""What a layout costs before a GPU is rented: parameters, memory, time. Pure functions of model, layout and device; no torch."""
