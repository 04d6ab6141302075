"""Models of Hugging Face become runs of eellm, and runs become models of Hugging Face: one process, tensor by tensor."""
