"""What stands in the files of methods: folders and arms, claims, resources, and their code."""
