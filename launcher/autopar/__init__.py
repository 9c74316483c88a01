"""Planning: from a model and a cluster to a `Plan`, without any device.

make_plan(model, cluster, options)    search, or the degrees that were forced
predict(plan, model, cluster)         price any plan on any cluster
load_cluster(name)                    a packaged cluster, or a YAML file of one
auto_shard(step, *args, mesh=...)     shard any traceable function; needs nothing else of the launcher
"""

from launcher.autopar.clusters.cluster import load_cluster as load_cluster
from launcher.autopar.clusters.collective_costs import AlpaCosts as AlpaCosts
from launcher.autopar.clusters.collective_costs import RingCosts as RingCosts
from launcher.autopar.clusters.compute import ComputeModel as ComputeModel
from launcher.autopar.clusters.hosts import Cluster as Cluster
from launcher.autopar.clusters.mesh import LogicalMesh as LogicalMesh
from launcher.autopar.inter_op.space import PlanOptions as PlanOptions
from launcher.autopar.make_plan import make_plan as make_plan
from launcher.autopar.plans.plan import Plan as Plan
from launcher.autopar.predictions.predict import predict as predict
from launcher.autopar.whole_graph.auto_shard import ShardedFunction as ShardedFunction
from launcher.autopar.whole_graph.auto_shard import auto_shard as auto_shard
from launcher.autopar.whole_graph.intra_op_options import IntraOpOptions as IntraOpOptions
