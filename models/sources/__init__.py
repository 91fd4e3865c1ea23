"""Where the weights of backbones come from: names of the settings, files, folders and model cards."""
