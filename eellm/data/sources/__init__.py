"""Where documents come from, one kind of source a module. Each has `documents(data)`, in a fixed order."""
