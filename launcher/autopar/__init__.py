"""Planning: from a model and a cluster to a `Plan`, without any device.

make_plan(model, cluster, options)    search, or the degrees that were forced
predict(plan, model, cluster)         price any plan on any cluster
load_cluster(name)                    a packaged cluster, or a YAML file of one
"""

from launcher.autopar.cluster import Cluster as Cluster
from launcher.autopar.cluster import load_cluster as load_cluster
from launcher.autopar.make_plan import make_plan as make_plan
from launcher.autopar.mesh import LogicalMesh as LogicalMesh
from launcher.autopar.plan import Plan as Plan
from launcher.autopar.predict import predict as predict
from launcher.autopar.search import PlanOptions as PlanOptions
