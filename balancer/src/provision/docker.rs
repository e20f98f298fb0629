//! Nodes as containers of the Docker engine of this machine. This is the only file that names bollard.
//!
//! A container and a volume for each instance, both of one name. It touches nothing that does not carry the label of its
//! group: other containers, and those of other clusters on the same engine, it neither sees nor stops. It is never used
//! unless it is asked for, because whoever may talk to the engine is root on its machine.

#![expect(clippy::disallowed_types, reason = "bollard's own types are hash maps; nothing here depends on their order")]

use super::{Answer, Instance, ProvisionError, Provisioner, Spec};
use bollard::Docker;
use bollard::errors::Error;
use bollard::models::{
    ContainerCreateBody, ContainerSummary, ContainerSummaryStateEnum, EndpointSettings, HostConfig, Mount, MountType,
    NetworkingConfig, PortBinding, RestartPolicy, RestartPolicyNameEnum, VolumeCreateRequest,
};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, InspectNetworkOptions, ListContainersOptionsBuilder, RemoveContainerOptionsBuilder,
    RemoveVolumeOptionsBuilder, StopContainerOptionsBuilder,
};
use shkv_proto::ClusterId;
use std::collections::HashMap;
use std::fmt::Display;

/// Label of everything that is made here: which group of containers it belongs to.
const GROUP: &str = "shkv.group";
/// Label: the cluster.
const CLUSTER: &str = "shkv.cluster";
/// Label: the instance.
const INSTANCE: &str = "shkv.instance";
/// Label: the name of the node.
const NAME: &str = "shkv.name";
/// Label: the port of the host that leads to the node.
const PORT: &str = "shkv.port";
/// Where a node listens in its container.
const NODE_PORT: u16 = 7401;
/// Where a node's data is in its container; the image makes it writable for the user that it runs as.
const DATA: &str = "/data";
/// Seconds for everything that the engine is asked.
const ANSWER_TIME_MAX_S: u64 = 60;
/// Seconds for a node to hand its leaderships over, before the engine kills it.
const STOP_TIME_MAX_S: i32 = 15;
/// How often a crashing node is started again by the engine; what it cannot bring back, the controller replaces.
const RESTARTS_MAX: i64 = 5;
/// Most ports of the host that are looked through for a free one.
const PORTS_MAX: u16 = 1_000;

/// How containers are made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DockerConfig {
    /// The engine's socket.
    pub socket: String,
    /// What all containers of this deployment have in common; two deployments on one engine have two.
    pub group: String,
    /// The image; it must be on the engine.
    pub image: String,
    /// The network; it must be there.
    pub network: String,
    /// Bytes of memory that a container may take.
    pub memory_bytes: Option<u64>,
    /// Thousandths of a core that a container may take.
    pub cpu_millis: Option<u32>,
    /// Publish nodes on this address of the host, on ports from this one up, so that clients on the host reach them.
    pub publish: Option<(String, u16)>,
    /// More arguments of `shkv node`.
    pub node_args: Vec<String>,
}

/// Nodes as containers.
#[derive(Debug)]
pub struct DockerProvisioner {
    docker: Docker,
    config: DockerConfig,
}

impl DockerProvisioner {
    /// Connects to the engine and looks whether image and network are there.
    ///
    /// # Errors
    /// What is missing, and what to do.
    pub async fn connect(config: DockerConfig) -> Result<Self, ProvisionError> {
        let unreachable = |error: Error| {
            ProvisionError(format!(
                "the Docker engine does not answer at {}: {error}; start it, or give this process its socket (--docker-socket)",
                config.socket
            ))
        };
        let docker = Docker::connect_with_unix(&config.socket, ANSWER_TIME_MAX_S, bollard::API_DEFAULT_VERSION)
            .map_err(unreachable)?;
        let docker = docker.negotiate_version().await.map_err(unreachable)?;
        let made = Self { docker, config };
        made.check().await?;
        Ok(made)
    }

    /// The cluster of the containers that are there already, if there are any.
    ///
    /// # Errors
    /// The engine's words; containers of two clusters in one group.
    pub async fn cluster(&self) -> Result<Option<ClusterId>, ProvisionError> {
        let mut found = None;
        for container in self.containers().await? {
            let text = label(&container, CLUSTER).unwrap_or_default();
            let Ok(cluster) = u128::from_str_radix(text, 16).map(ClusterId) else { continue };
            if *found.get_or_insert(cluster) != cluster {
                return Err(ProvisionError(format!(
                    "the containers of group {} belong to two clusters; give each its own --docker-group",
                    self.config.group
                )));
            }
        }
        Ok(found)
    }

    async fn check(&self) -> Result<(), ProvisionError> {
        let DockerConfig { image, network, .. } = &self.config;
        match self.docker.inspect_image(image).await {
            Ok(_) => {}
            Err(error) if is_missing(&error) => {
                return Err(ProvisionError(format!(
                    "the engine has no image {image}; build it with docker/build, or name another by --docker-image"
                )));
            }
            Err(error) => return Err(wrong(&format!("looking for image {image}"), &error)),
        }
        match self.docker.inspect_network(network, None::<InspectNetworkOptions>).await {
            Ok(_) => Ok(()),
            Err(error) if is_missing(&error) => Err(ProvisionError(format!(
                "the engine has no network {network}; make it with `docker network create {network}`, or name another by --docker-network"
            ))),
            Err(error) => Err(wrong(&format!("looking for network {network}"), &error)),
        }
    }

    async fn containers(&self) -> Result<Vec<ContainerSummary>, ProvisionError> {
        let ours = HashMap::from([("label".to_owned(), vec![format!("{GROUP}={}", self.config.group)])]);
        let options = ListContainersOptionsBuilder::default().all(true).filters(&ours).build();
        self.docker.list_containers(Some(options)).await.map_err(|error| wrong("listing the containers", &error))
    }

    async fn find(&self, instance: &str) -> Result<Option<ContainerSummary>, ProvisionError> {
        Ok(self.containers().await?.into_iter().find(|container| label(container, INSTANCE) == Some(instance)))
    }

    /// The name of an instance's container and of its volume. It is also where other containers find it.
    fn container_name(&self, instance: &str) -> String {
        let sound = |c: char| if c.is_ascii_alphanumeric() || "_.-".contains(c) { c } else { '-' };
        format!("{}-{instance}", self.config.group).chars().map(sound).collect()
    }

    async fn start_instance(&self, spec: &Spec) -> Result<(), ProvisionError> {
        let name = self.container_name(&spec.instance);
        if let Some(there) = self.find(&spec.instance).await? {
            if is_running(&there) {
                return Ok(());
            }
            let started = self.docker.start_container(&name, None).await;
            return started.map_err(|error| wrong(&format!("starting container {name}"), &error));
        }
        self.check().await?;
        let port = self.free_port().await?;
        let body = self.body(spec, &name, port);
        let volume = VolumeCreateRequest {
            name: Some(name.clone()),
            labels: body.labels.clone(),
            ..VolumeCreateRequest::default()
        };
        self.docker.create_volume(volume).await.map_err(|error| wrong(&format!("making volume {name}"), &error))?;
        let options = CreateContainerOptionsBuilder::default().name(&name).build();
        let made = match self.docker.create_container(Some(options), body).await {
            Ok(_) => self.docker.start_container(&name, None).await,
            Err(error) => {
                // A container of this name that is not ours stays; what was made for ours goes.
                self.remove_volume(&name).await?;
                return Err(wrong(&format!("making container {name}"), &error));
            }
        };
        match made {
            Ok(()) => Ok(()),
            Err(error) => {
                self.remove_all(&name).await?;
                Err(wrong(&format!("starting container {name}"), &error))
            }
        }
    }

    fn body(&self, spec: &Spec, name: &str, port: Option<u16>) -> ContainerCreateBody {
        let DockerConfig { group, image, network, memory_bytes, cpu_millis, publish, node_args, .. } = &self.config;
        let mut labels = HashMap::from([
            (GROUP.to_owned(), group.clone()),
            (CLUSTER.to_owned(), spec.cluster.to_string()),
            (INSTANCE.to_owned(), spec.instance.clone()),
            (NAME.to_owned(), spec.name.clone()),
        ]);
        let mut command: Vec<String> = ["node", "--data", DATA].map(String::from).to_vec();
        command.extend(["--listen".into(), format!("0.0.0.0:{NODE_PORT}")]);
        command.extend(["--advertise".into(), format!("{name}:{NODE_PORT}")]);
        command.extend(["--name".into(), spec.name.clone(), "--instance".into(), spec.instance.clone()]);
        command.extend(["--join".into(), spec.join.join(",")]);
        let inside = format!("{NODE_PORT}/tcp");
        let mut port_bindings = None;
        if let (Some((host, _)), Some(port)) = (publish, port) {
            labels.insert(PORT.to_owned(), port.to_string());
            command.extend(["--advertise-outside".into(), format!("{host}:{port}")]);
            let binding = PortBinding { host_ip: Some(host.clone()), host_port: Some(port.to_string()) };
            port_bindings = Some(HashMap::from([(inside.clone(), Some(vec![binding]))]));
        }
        command.extend(node_args.iter().cloned());
        let volume = Mount {
            target: Some(DATA.into()),
            source: Some(name.to_owned()),
            typ: Some(MountType::VOLUME),
            ..Mount::default()
        };
        let restart =
            RestartPolicy { name: Some(RestartPolicyNameEnum::ON_FAILURE), maximum_retry_count: Some(RESTARTS_MAX) };
        let endpoint = EndpointSettings { aliases: Some(vec![spec.name.clone()]), ..EndpointSettings::default() };
        ContainerCreateBody {
            image: Some(image.clone()),
            cmd: Some(command),
            labels: Some(labels),
            exposed_ports: Some(vec![inside]),
            stop_timeout: Some(i64::from(STOP_TIME_MAX_S)),
            host_config: Some(HostConfig {
                mounts: Some(vec![volume]),
                restart_policy: Some(restart),
                memory: memory_bytes.map(|bytes| i64::try_from(bytes).unwrap_or(i64::MAX)),
                nano_cpus: cpu_millis.map(|millis| i64::from(millis) * 1_000_000),
                port_bindings,
                network_mode: Some(network.clone()),
                ..HostConfig::default()
            }),
            networking_config: Some(NetworkingConfig {
                endpoints_config: Some(HashMap::from([(network.clone(), endpoint)])),
            }),
            ..ContainerCreateBody::default()
        }
    }

    /// The lowest port that none of the group's containers has. One that somebody else has makes the start fail, clearly.
    async fn free_port(&self) -> Result<Option<u16>, ProvisionError> {
        let Some((_, first)) = self.config.publish else { return Ok(None) };
        let containers = self.containers().await?;
        let taken: Vec<u16> = containers.iter().filter_map(|there| label(there, PORT)?.parse().ok()).collect();
        let last = first.saturating_add(PORTS_MAX);
        match (first..=last).find(|port| !taken.contains(port)) {
            Some(port) => Ok(Some(port)),
            None => Err(ProvisionError(format!("no port from {first} to {last} is free to publish a node on"))),
        }
    }

    async fn remove_instance(&self, instance: &str) -> Result<(), ProvisionError> {
        let Some(there) = self.find(instance).await? else { return Ok(()) };
        let name = self.container_name(instance);
        if is_running(&there) {
            let options = StopContainerOptionsBuilder::default().t(STOP_TIME_MAX_S).build();
            match self.docker.stop_container(&name, Some(options)).await {
                Ok(()) => {}
                Err(error) if is_missing(&error) || is_unchanged(&error) => {}
                Err(error) => return Err(wrong(&format!("stopping container {name}"), &error)),
            }
        }
        self.remove_all(&name).await
    }

    async fn remove_all(&self, name: &str) -> Result<(), ProvisionError> {
        let options = RemoveContainerOptionsBuilder::default().force(true).build();
        match self.docker.remove_container(name, Some(options)).await {
            Ok(()) => {}
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(wrong(&format!("removing container {name}"), &error)),
        }
        self.remove_volume(name).await
    }

    async fn remove_volume(&self, name: &str) -> Result<(), ProvisionError> {
        let options = RemoveVolumeOptionsBuilder::default().build();
        match self.docker.remove_volume(name, Some(options)).await {
            Ok(()) => Ok(()),
            Err(error) if is_missing(&error) => Ok(()),
            Err(error) => Err(wrong(&format!("removing volume {name}"), &error)),
        }
    }
}

impl Provisioner for DockerProvisioner {
    fn kind(&self) -> &'static str {
        "docker"
    }

    fn list(&self, cluster: ClusterId) -> Answer<'_, Vec<Instance>> {
        Box::pin(async move {
            let cluster = cluster.to_string();
            let instance = |there: &ContainerSummary| {
                Some(Instance {
                    instance: label(there, INSTANCE).filter(|_| label(there, CLUSTER) == Some(&cluster))?.to_owned(),
                    name: label(there, NAME)?.to_owned(),
                    running: is_running(there),
                })
            };
            Ok(self.containers().await?.iter().filter_map(instance).collect())
        })
    }

    fn start<'a>(&'a self, spec: &'a Spec) -> Answer<'a, ()> {
        Box::pin(self.start_instance(spec))
    }

    fn remove<'a>(&'a self, _cluster: ClusterId, instance: &'a str) -> Answer<'a, ()> {
        Box::pin(self.remove_instance(instance))
    }
}

fn label<'a>(container: &'a ContainerSummary, name: &str) -> Option<&'a str> {
    container.labels.as_ref()?.get(name).map(String::as_str)
}

fn is_running(container: &ContainerSummary) -> bool {
    matches!(
        container.state,
        Some(
            ContainerSummaryStateEnum::RUNNING
                | ContainerSummaryStateEnum::RESTARTING
                | ContainerSummaryStateEnum::PAUSED
        )
    )
}

fn is_missing(error: &Error) -> bool {
    matches!(error, Error::DockerResponseServerError { status_code: 404, .. })
}

fn is_unchanged(error: &Error) -> bool {
    matches!(error, Error::DockerResponseServerError { status_code: 304, .. })
}

fn wrong(what: &str, error: &impl Display) -> ProvisionError {
    ProvisionError(format!("Docker: {what}: {error}"))
}
