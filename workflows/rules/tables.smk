# Tables: a pure function of the cells' records, published beside them.


rule table:
    input:
        stamps=lambda w: WORKFLOW.stamps(w.table),
        cells="results/runs/{table}.cells",
        file="workflows/tables/{table}.yaml",
    output:
        # update: Snakemake would delete the published table before rendering, and after an interrupt
        update("results/{table}.md"),
        update("results/{table}.csv"),
        update("results/{table}.json"),
        update("results/{table}.png"),
    wildcard_constraints:
        table="|".join(set(WORKFLOW.jobs) - set(WORKFLOW.experiments)) or "none",
    message:
        "results/{wildcards.table}.md"
    shell:
        "exec python -m distillbench.cli table {wildcards.table} {WORKFLOW.as_profile}"


# Tables of costs have no cells: they read the published records of other tables, the first of which is made if need be.
rule costs:
    input:
        source=lambda w: f"results/{WORKFLOW.costs[w.table]}.md",
        file="workflows/tables/{table}.yaml",
    output:
        update("results/{table}.md"),
        update("results/{table}.csv"),
        update("results/{table}.json"),
    wildcard_constraints:
        table="|".join(WORKFLOW.costs) or "none",
    message:
        "results/{wildcards.table}.md"
    shell:
        "exec python -m distillbench.cli table {wildcards.table}"
