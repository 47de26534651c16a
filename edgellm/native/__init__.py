"""The only package that imports llama_cpp. Native failures become edgellm's errors here, and nowhere else."""
